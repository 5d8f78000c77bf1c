"""The simulator: the scheduler, allocator and policy of the engine on a virtual clock, with measured step times."""
