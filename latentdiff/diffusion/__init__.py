"""The diffusion mathematics; the network is an argument."""
