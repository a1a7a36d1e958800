"""Evaluation protocols, localization, prediction, export, the web demo."""
