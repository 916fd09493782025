"""The models behind the families: their classes and published configs, by family and size."""

from . import flux, images, others, text, unets
from .build import Converter as Converter
from .build import Model as Model

CLASSES = {**flux.CLASSES, **images.CLASSES, **others.CLASSES, **unets.CLASSES}
EMBEDDINGS = text.EMBEDDINGS
CONVERTERS = {**flux.CONVERTERS, **images.CONVERTERS, **others.CONVERTERS, **unets.CONVERTERS}
