"""Many hosts, one load: how they meet, agree, and hear of each other's failures."""
