"""Training of on-device mixture-of-experts language models: configuration, model, trainer, checkpoints, export."""
