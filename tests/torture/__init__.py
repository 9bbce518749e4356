"""What a build must survive: kills, company, damage; and what must not change its bytes or its digests."""
