"""Tools to test what uses this package: store conformance suite, faults, servers, simulator."""
