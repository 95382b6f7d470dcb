"""recsys_ray: products, reviews and interactions in; search and recommendation out, on Ray."""
