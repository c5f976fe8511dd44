"""Tests of mot_megatron.data.documents."""
