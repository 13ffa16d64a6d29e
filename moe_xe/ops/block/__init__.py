"""The MoE MLP block: one call for inference, its gradients for training."""
