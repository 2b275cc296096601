"""Modules that the server of `distributed_runs` imports once for all of its forks."""

import gc

import framework

framework.discover()
gc.freeze()
