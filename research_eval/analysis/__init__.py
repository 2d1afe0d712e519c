"""Reads the store and draws; never imports a model or torch."""
