"""Tests; this file lets pytest run from any folder."""
