"""What happens around a step of an optimizer? Plain torch, for any training loop."""
