"""The models behind the families: their classes and published configs, by family and size."""

from . import flux, images, others, unets

CLASSES = {**flux.CLASSES, **images.CLASSES, **others.CLASSES, **unets.CLASSES}
EMBEDDINGS = flux.EMBEDDINGS | images.EMBEDDINGS | others.EMBEDDINGS | unets.EMBEDDINGS
