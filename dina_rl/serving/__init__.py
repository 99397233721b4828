"""A scorer behind HTTP: what is asked (`protocol`), how it is batched (`batcher`), who may ask how much (`server`)."""
