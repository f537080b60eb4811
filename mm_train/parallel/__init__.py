"""A finished model spread over processes, in one visible order: groups, tensors, experts, then the engine.

The only folder that imports deepspeed and megatron.core. It leans on private names of deepspeed 0.19.8, which is
therefore pinned; what it needs of them is noted where it is used.
"""
