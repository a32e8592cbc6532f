"""The save protocol as three pure state machines: worker, host, coordinator.

Nothing here touches Ray, a clock, randomness or storage: time arrives in events, I/O leaves as `flows.Io`
values and comes back as results. The simulator (`ray_ckpt.testing.simulator`) and the real processes
(`checkpointer`, `agent`, `coordinator`) drive the same objects.

Each hop sends its whole state up (a report) and gets back the whole state that concerns it (a view), so a
lost, repeated, late or reordered message needs no handling of its own, and a restarted process is
rebuilt by the next reports. See ``docs/design/0001-spine.md``.
"""
