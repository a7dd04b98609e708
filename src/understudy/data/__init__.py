"""Data: formats, batches of rows, built-in sets, sources."""

from understudy.data.augment import augment
from understudy.data.batch import IGNORE, UNLABELLED, Batch
from understudy.data.folders import data_folder, find
from understudy.data.graphs import GraphBatch, GraphSet, GraphSplits, collate_graph, load_graph
from understudy.data.image_set import ImageSet
from understudy.data.images import Splits, collate_images, load_images
from understudy.data.lists import ListBatch, collate_lists, encode_lists, mismatched
from understudy.data.noise_sets import NoiseBatch, NoiseSet
from understudy.data.preferences import load_preferences
from understudy.data.text import TextSplits, load_text
from understudy.data.tokenize import Counts, TextSet, collate_text, encode, show_batch, train_tokenizer

__all__ = [
    "IGNORE",
    "UNLABELLED",
    "Batch",
    "Counts",
    "GraphBatch",
    "GraphSet",
    "GraphSplits",
    "ImageSet",
    "ListBatch",
    "NoiseBatch",
    "NoiseSet",
    "Splits",
    "TextSet",
    "TextSplits",
    "augment",
    "collate_graph",
    "collate_images",
    "collate_lists",
    "collate_text",
    "data_folder",
    "encode",
    "encode_lists",
    "find",
    "load_graph",
    "load_images",
    "load_preferences",
    "load_text",
    "mismatched",
    "show_batch",
    "train_tokenizer",
]
