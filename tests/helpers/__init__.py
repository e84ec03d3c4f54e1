"""What tests share: models, reference answers, inputs."""
