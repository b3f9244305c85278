"""Inference: conversion to packed weights, sampling and generation."""

from bitjax.infer.convert import pack_model
from bitjax.infer.generator import Completion, Generator
from bitjax.infer.sampling import SamplingParams
from bitjax.infer.session import Session

__all__ = ["Completion", "Generator", "SamplingParams", "Session", "pack_model"]
