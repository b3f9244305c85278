"""Inference: conversion to packed weights, sampling and generation."""

from bitjax.infer.convert import pack_model
from bitjax.infer.generator import Completion, Generator
from bitjax.infer.sampling import SamplingParams

__all__ = ["Completion", "Generator", "SamplingParams", "pack_model"]
