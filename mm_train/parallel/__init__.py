"""A finished model spread over processes, in one visible order: groups, tensors, experts, then the engine.

The only folder that imports deepspeed and megatron.core. It leans on private names of deepspeed 0.19.8 and torch 2.13,
which are therefore pinned; what it needs of them is noted where it is used.
"""
