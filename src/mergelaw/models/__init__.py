"""Models: checkpoints, adapters, sizes, pre-training and fine-tuning."""
