"""Other people's weights: models of CompVis latent-diffusion and folders of diffusers come in, and go out again."""
