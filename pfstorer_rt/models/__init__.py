"""The networks: restorer UNet, structure encoder, personalization blocks, autoencoder, base."""
