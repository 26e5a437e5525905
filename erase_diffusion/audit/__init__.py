"""Batch generation audits: plan what is drawn, draw it, score it, conclude; each part can be done again by itself."""
