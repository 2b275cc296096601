"""Modules that the server of `distributed_runs` imports once for all of its forks."""

import gc

import torch._dynamo  # by optimizers

import framework

framework.discover()
gc.freeze()
