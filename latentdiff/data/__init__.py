"""Pictures with captions: sprites, and the scenes composed of them."""
