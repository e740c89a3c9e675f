"""Look into shards as training reads them."""
