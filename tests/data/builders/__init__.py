"""Tests of mot_megatron.data.builders."""
