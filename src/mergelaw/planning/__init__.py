"""Forecasts and questions to a fitted law."""
