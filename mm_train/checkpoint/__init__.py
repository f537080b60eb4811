"""Topology-free, sharded, streaming, exact checkpoints: whatever layout wrote one, any layout reads it, bit for bit.

    RUN/checkpoints/step-00000100/manifest.json           step, data position, config, what lies where, sha256 of all
                                  rank-00000.safetensors  what one rank answers for: weights, moments, 1-D float32
    RUN/checkpoints/latest                                name of the newest one, digest of its manifest

`boxes` are blocks of tensors, `files` a safetensors file, `format` a checkpoint folder, `folders` the checkpoints of a
run; on top of them `writer` (with `share`: what one rank writes) and `reader`; and `python -m mm_train.checkpoint` for
people (`show`, `convert`, `bench`). The first four and `show` are torch-free.
"""
