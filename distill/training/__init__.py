"""Distillation and fine-tuning: the trainer, its losses, its teachers."""
