"""Exporters: formats in which `framework export` writes trained models."""
