"""The `MTLFLASHATTN_*` variables that are no settings: they belong to the simulator's machine."""

# Where the simulator finds its compiler, and keeps what that made.
TOOLS = {"MTLFLASHATTN_CLANG", "MTLFLASHATTN_SIMULATOR_CACHE"}
