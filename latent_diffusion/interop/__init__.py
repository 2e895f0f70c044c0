"""Other people's weights: models of CompVis latent-diffusion come in and go out again."""
