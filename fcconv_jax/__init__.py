"""fcconv_jax: one linear map, two forms (under construction)."""
