"""What happens beside the steps of training, a small class each; `train.CALLBACKS` says which, and in which order."""
