"""Programs that use a trained model, run from the checkout: `python -m inference.evaluate`, ..."""
