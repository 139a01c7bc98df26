"""Programs that train, run from the checkout: `accelerate launch -m training.diffusion`, ..."""
