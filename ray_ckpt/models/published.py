"""Published models: their tensors by the published configuration, cut as their usual training codes cut them.

Mesh axes: "data" copies, "fsdp" cuts parameters by their embedding dimension, "tensor" by heads, hidden units or
vocabulary (as MaxText names and places them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

from ray_ckpt.models.tensor import Model, Tensor, adafactor, adam, rowwise_adagrad

_IN = (("fsdp",), ("tensor",))
_OUT = (("tensor",), ("fsdp",))


def gpt2(name: str = "gpt2-124m", layers: int = 12, width: int = 768, vocabulary: int = 50257) -> Model:
    """GPT-2 small, 124,439,808 parameters with tied embeddings, and Adam.

    Source: Radford et al. 2019, table 2; github.com/openai/gpt-2 ``src/model.py`` and ``hparams.json`` of 124M (n_vocab
    50257, n_ctx 1024, n_embd 768, n_head 12, n_layer 12).
    """
    return Model(name, "GPT-2 124M with Adam", tuple(_gpt2(layers, width, vocabulary)), adam)


def _gpt2(layers: int, width: int, vocabulary: int) -> Iterator[Tensor]:
    yield Tensor("wte", (vocabulary, width), _OUT)
    yield Tensor("wpe", (1024, width), ((), ("fsdp",)))
    for i in range(layers):
        for norm in ("ln_1", "ln_2"):
            yield from (Tensor(f"h{i}/{norm}/{part}", (width,)) for part in ("g", "b"))
        shapes = {"attn/c_attn": (width, 3 * width, _IN), "attn/c_proj": (width, width, _OUT)}
        shapes |= {"mlp/c_fc": (width, 4 * width, _IN), "mlp/c_proj": (4 * width, width, _OUT)}
        for part, (rows, columns, axes) in shapes.items():
            yield Tensor(f"h{i}/{part}/w", (rows, columns), axes)
            yield Tensor(f"h{i}/{part}/b", (columns,))
    yield from (Tensor(f"ln_f/{part}", (width,)) for part in ("g", "b"))


def t5(name: str, title: str, layers: int, width: int, hidden: int, heads: int, head: int) -> Model:
    """T5 1.0 with tied embeddings, 32,128 words, and Adafactor, with which it was trained.

    Source: Raffel et al. 2020, section 3.7; ``config.json`` of t5-small (60,506,624 parameters) and t5-11b
    (11,307,321,344): d_model, d_ff, num_heads, d_kv, num_layers, relative_attention_num_buckets 32.
    """
    tensors = [Tensor("shared", (32128, width), _OUT)]
    for side, attentions in (("encoder", ("self",)), ("decoder", ("self", "cross"))):
        tensors.append(Tensor(f"{side}/relative_attention_bias", (32, heads), ((), ("tensor",))))
        for i in range(layers):
            for attention in attentions:
                at = f"{side}/{i}/{attention}"
                tensors += [Tensor(f"{at}/{part}", (width, heads * head), _IN) for part in "qkv"]
                tensors += [Tensor(f"{at}/o", (heads * head, width), _OUT), Tensor(f"{at}/norm", (width,))]
            tensors += [Tensor(f"{side}/{i}/mlp/wi", (width, hidden), _IN)]
            tensors += [Tensor(f"{side}/{i}/mlp/wo", (hidden, width), _OUT), Tensor(f"{side}/{i}/mlp/norm", (width,))]
        tensors.append(Tensor(f"{side}/final_norm", (width,)))
    return Model(name, title, tuple(tensors), adafactor)


def llama3(name: str, title: str, layers: int, width: int, hidden: int, heads: int) -> Model:
    """Llama 3 with 8 key-value heads, 128,256 words, embeddings not tied, and AdamW; all in float32.

    Source: Grattafiori et al. 2024, table 3; ``config.json`` of Meta-Llama-3-8B (8,030,261,248 parameters) and
    Meta-Llama-3-70B (70,553,706,496): hidden_size, intermediate_size, num_hidden_layers, num_attention_heads.
    """
    small = 8 * width // heads
    tensors = [Tensor("embed_tokens", (128256, width), _OUT)]
    for i in range(layers):
        for part, columns in (("q", width), ("k", small), ("v", small)):
            tensors.append(Tensor(f"layers/{i}/self_attn/{part}_proj", (width, columns), _IN))
        tensors.append(Tensor(f"layers/{i}/self_attn/o_proj", (width, width), _OUT))
        tensors += [Tensor(f"layers/{i}/mlp/{part}_proj", (width, hidden), _IN) for part in ("gate", "up")]
        tensors.append(Tensor(f"layers/{i}/mlp/down_proj", (hidden, width), _OUT))
        tensors += [Tensor(f"layers/{i}/{norm}_layernorm", (width,)) for norm in ("input", "post_attention")]
    tensors += [Tensor("norm", (width,)), Tensor("lm_head", (width, 128256), _IN)]
    return Model(name, title, tuple(tensors), adam)


_CRITEO_ROWS = (
    *(39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10),
    *(2208, 11938, 155, 4, 976, 14, 39979771, 25641295, 39664984, 585935, 12972, 108, 36),
)


def dlrm() -> Model:
    """DLRM on Criteo 1TB as in MLPerf training: 187,767,399 rows of 128, tables cut by rows over all devices.

    24,036,595,969 parameters, of which 2,368,897 are in the MLPs, with row-wise Adagrad, an option of that
    code (MLPerf's run used SGD).
    Source: Naumov et al. 2019; github.com/facebookresearch/dlrm ``bench/run_and_time.sh`` (--max-ind-range=40000000
    --arch-mlp-bot=13-512-256-128 --arch-mlp-top=1024-1024-512-256-1 --arch-sparse-feature-size=128).
    """
    by_rows = (("data", "fsdp", "tensor"),)
    tensors = [Tensor(f"emb/{i}", (rows, 128), by_rows, uneven=True) for i, rows in enumerate(_CRITEO_ROWS)]
    # 27 vectors, the products of all pairs and the dense vector itself.
    for mlp, widths in (("bottom", (13, 512, 256, 128)), ("top", (27 * 26 // 2 + 128, 1024, 1024, 512, 256, 1))):
        for i, (rows, columns) in enumerate(pairwise(widths)):
            tensors += [Tensor(f"{mlp}/{i}/w", (rows, columns)), Tensor(f"{mlp}/{i}/b", (columns,))]
    return Model("dlrm-criteo1tb", "DLRM, Criteo 1TB (MLPerf), row-wise Adagrad", tuple(tensors), rowwise_adagrad)


MODELS: dict[str, Callable[[], Model]] = {
    "gpt2-124m": gpt2,
    "t5-small": partial(t5, "t5-small", "T5 small with Adafactor", 6, 512, 2048, 8, 64),
    "t5-11b": partial(t5, "t5-11b", "T5 11B with Adafactor", 24, 1024, 65536, 128, 128),
    "llama3-8b": partial(llama3, "llama3-8b", "Llama 3 8B with AdamW", 32, 4096, 14336, 32),
    "llama3-70b": partial(llama3, "llama3-70b", "Llama 3 70B with AdamW", 80, 8192, 28672, 64),
    "dlrm-criteo1tb": dlrm,
}
"""By name; each is made when it is called."""
