"""The network: transformer, conditioning, discriminator."""
