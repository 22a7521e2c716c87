"""Keys that the runs of a federation log, and keys that look like them."""

CLIENTS = ["client-0", "ward 3/scanner.b", "a.b/c d", "residual"]
LAYERS = ["network.0", "blocks.1/conv 2", "head (last)", "iterations"]
FAMILIES = [  # what one panel shows together
    {"train_loss", "loss", "train/loss", "val_loss", "validation/loss", "train_loss_epoch"},
    *(
        {f"fedfisher/{kind}{name}/{layer}" for kind in ("", "kfac-mc/") for layer in LAYERS}
        for name in ("trace", "effective_rank")
    ),
    *({name} for name in ("objective", "residual", "iterations")),
    {f"residual/{layer}" for layer in LAYERS},
    *({f"{name}/{client}" for client in CLIENTS} for name in ("distance", "influence")),
]
OTHERS = {  # what no line plot shows
    *("epoch", "trainer/global_step", "_step", "train_loss_step", "losses", "test/loss", "no_loss"),
    *("fedfisher/extraction_seconds", "fedfisher/extracted_samples", "fedfisher/curvature"),
    *(
        "fedfisher/trace",
        "fedfisher/effective_rank/",
        "other/trace/network.0",
        "xfedfisher/trace/a",
    ),
    *(f"iterations/{layer}" for layer in LAYERS),
    *("test/accuracy", "clients", "server_seconds", "fedfisher/upload_bytes"),
    *(
        "val_residual",
        "residuals",
        "my/residual",
        "fedfisher/kfac/residual",
        "distance",
        "distance/",
    ),
}
