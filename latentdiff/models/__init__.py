"""The networks: U-Net, autoencoder and text encoder."""
