"""The models behind the families: their classes and published configs, by family and size."""

from . import flux, images, others, unets
from .build import Converter as Converter

CLASSES = {**flux.CLASSES, **images.CLASSES, **others.CLASSES, **unets.CLASSES}
EMBEDDINGS = flux.EMBEDDINGS | images.EMBEDDINGS | others.EMBEDDINGS | unets.EMBEDDINGS
CONVERTERS = {**flux.CONVERTERS, **images.CONVERTERS, **others.CONVERTERS, **unets.CONVERTERS}
