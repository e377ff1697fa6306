"""The lab book: experiments, each given by the row that it builds on and the constants that it changes.

Rows 1 to 26 are the project's log of 2021, rows 27 to 29 are ideas that the log left open, later rows are
new. `BASE` has the values of all constants before any change. Recorded results are miss rates in %, single
or as all / day / night. They were measured by an evaluator that drops frames without detections.
"""

from __future__ import annotations

from typing import Any, NamedTuple

BASE = (
    dict(seed=42, network="ssd300", input_mode="lwir", input_size=(300, 300), batch_norm=False, width=1.0)
    | dict(pixel_mean=(0.485, 0.456, 0.406, 0.449), pixel_std=(0.229, 0.224, 0.225, 0.226))
    | dict(priors="ssd300", centres="even", pretrained="imagenet", lwir_filters="mean")
    | dict(infusion=(0, 0, 0, 0, 0, 0), infusion_conv=False, seg_cells="mean", seg_maps="mean")
    | dict(seg_balance="none", seg_person_share=0.2, seg_weight=1.0, masks_follow=False, out_of_range="keep")
    | dict(loc_loss="l1", loc_reduction="mean", conf_divisor="positives")
    | dict(optimizer="sgd", lr=1e-3, bias_lr_factor=2.0, weight_decay=5e-4, ema_decay=0.0)
    | dict(schedule="constant", batch_size=8, epochs=122, validation=0.1)
    | dict(augment=False, zoom_out=4.0, crop_aspect=(0.4, 1.6), min_input_height=0.0)
    | dict(hue_saturation=True, lwir_jitter=True, jitter=0.0, copy_paste=0.0, modality_dropout=0.0)
    | dict(mirror_apart=0.0, crop_apart=0.0, shift_left=0.0)
    | dict(learn="person", min_height=12.0, margin=5.0)
    | dict(eval_every=5, min_score=0.2, nms_iou=0.5, max_boxes=200, test_flip=False)
)

# Corrections of the log's choices, found by a review; rows from 26b on have them.
CORRECTIONS = {
    "pixel_mean": (0.3465, 0.3219, 0.2842, 0.1598),  # KAIST's; ImageNet's map LWIR to -1.3 +- 0.29
    "pixel_std": (0.2358, 0.2265, 0.2274, 0.0813),
    "lwir_filters": "sum",  # the mean responds to LWIR a third as much, with the full bias
    "centres": "stride",  # even centres are up to 4 pixels away from the centres of the receptive fields
    "conf_divisor": "balanced",  # frames without persons inflate the loss of small batches
    "zoom_out": 2.0,  # 4 leaves a sixth of the persons below 16 pixels
    "crop_aspect": (0.8, 1.2),  # 0.5 to 2 halves or doubles the width of persons
    "min_input_height": 10.0,  # smaller persons have too few pixels to train on
}


class Row(NamedTuple):
    """An experiment.

    Attributes:
        based_on: the row that it builds on; "" for `BASE`.
        changes: constants of train.py, in lower case, and their new values.
        description: the changes in words.
        logged: the results that the log of 2021 recorded.
    """

    based_on: str
    changes: dict[str, Any]
    description: str
    logged: str = ""


EXPERIMENTS = {
    "1": Row(
        "",
        {},
        "LWIR, SGD, lr 1e-3, batch 8, 120k iterations, L1, no augmentation but resizing, 10% of train held "
        "out. The decay due at 80k iterations (epoch 81) never happened: an error occurred there, which may "
        "have ended the run",
        "train loss 0.2 at epoch 80, validation loss above 2: overfits",
    ),
    "2": Row(
        "1",
        {"optimizer": "adam"},
        "Adam; may also have ended at epoch 81",
        "NaN after about 30 epochs; 43.63 at epoch 25",
    ),
    "3": Row("2", dict(lr=5e-4, batch_size=32, epochs=150, schedule="step"), "decay at 2/3 and 5/6"),
    "4": Row(
        "1",
        dict(lr=5e-4, batch_size=32, epochs=150, schedule="step", augment=True, validation=0.0),
        "SGD, decay at 2/3 and 5/6, SSD augmentation, all frames",
        "29.03, recall 0.8330 (epoch 130)",
    ),
    "5": Row("4", {"validation": 0.1}, "10% validation split"),
    "6": Row("5", {"optimizer": "adam"}, "Adam"),
    "7": Row("6", {"loc_loss": "smooth_l1"}, "smooth L1"),
    "8": Row("7", {"epochs": 300}, "300 epochs"),
    "9": Row("7", {"validation": 0.0}, "no validation split, all frames", "29.18, recall 0.8029"),
    "10": Row("9", {"epochs": 120}, "120 epochs", "27.72, recall 0.8092"),
    "11": Row("9", {"epochs": 100}, "100 epochs, kept in later rows", "28.55, recall 0.8131"),
    "12": Row("11", {"batch_norm": True}, "BatchNorm", "28.25, recall 0.8173; 27.93 / 33.82 / 16.06"),
    "13": Row("12", {"input_mode": "visible"}, "visible", "35.52, recall 0.7742; 36.34 / 33.86 / 42.52"),
    "14": Row("12", {"input_mode": "mean"}, "mean of visible and LWIR, 3 channels", "34.75 / 35.27 / 33.55"),
    "15": Row("13", {"lr": 0.001}, "lr 1e-3"),
    "16": Row("12", {"eval_every": 10}, "evaluate every 10 epochs"),
    "17": Row("13", {"eval_every": 10}, "evaluate every 10 epochs"),
    "18": Row(
        "12",
        {"infusion": (1, 1, 0, 0, 0, 0)},
        "segmentation infusion on maps [1,1,0,0,0,0], mean over maps",
        "29.03, recall 0.8102; 29.02 / 33.77 / 19.17",
    ),
    "19": Row("18", {"seg_maps": "sum"}, "sum over maps", "26.09, recall 0.8296; 26.33 / 31.38 / 15.89"),
    "20": Row("19", {"infusion": (1, 1, 1, 0, 0, 0)}, "maps [1,1,1,0,0,0]", "27.72 / 32.78 / 16.59"),
    "21": Row("20", {"infusion_conv": True}, "3x3 conv (same width) before the 1x1", "27.12 / 33.33 / 14.15"),
    "22": Row("19", {"infusion": (1, 1, 1, 1, 1, 1)}, "maps [1,1,1,1,1,1]"),
    "23": Row("19", {"infusion": (1, 0, 0, 0, 0, 0)}, "maps [1,0,0,0,0,0]"),
    "24": Row(
        "23",
        {"seg_cells": "mean"},
        "mean over the cells of each map; each loss term is logged",
        "the mask loss is too small to learn from",
    ),
    "25": Row(
        "24",
        {"seg_cells": "sum"},
        "sum over the cells of each map, but not over the batch, which the log leaves open",
    ),
    "26": Row("23", {"masks_follow": True}, "masks follow the augmentation"),
    "26b": Row("26", CORRECTIONS, "row 26 with the log's mistakes corrected; later rows build on this one"),
    "27": Row(
        "26b", {"out_of_range": "background"}, "persons that match no prior of a map: background in its mask"
    ),
    "28": Row("26b", {"out_of_range": "ignore"}, "persons that match no prior of a map: ignored in its mask"),
    "29": Row(
        "22",
        {**CORRECTIONS, "masks_follow": True, "seg_maps": "uncertainty"},
        "22 with corrections, masks follow the augmentation, mask losses weighted by learned uncertainty",
    ),
    "30": Row("26b", {"copy_paste": 0.5}, "persons of other frames pasted into half of the frames"),
    "31": Row("26b", {"priors": "pedestrian"}, "priors of a person's shape (see python -m tools.priors)"),
    "32": Row("26b", {"input_size": (512, 640)}, "frames at their original size"),
    "33": Row("26b", {"input_mode": "halfway"}, "visible and LWIR in two streams, fused after conv4_3"),
    "34": Row(
        "33", {"modality_dropout": 0.25}, "one modality blanked in a quarter of the samples, as if missing"
    ),
    "35": Row(
        "26b",
        dict(pretrained="coco", batch_norm=False, priors="ssd300-coco")
        | dict(pixel_mean=(0.48235, 0.45882, 0.40784, 0.1598), pixel_std=(0.229, 0.224, 0.225, 0.0813)),
        "initial weights of torchvision's SSD300 for COCO, and what they need: no BatchNorm, COCO's priors, "
        "torchvision's normalisation of the visible image",
    ),
    "36": Row("26b", {"ema_decay": 0.999}, "weights averaged over about 1,000 steps"),
    "37": Row("26b", {"schedule": "cosine"}, "cosine schedule with warm-up"),
    "38": Row("26b", {"test_flip": True}, "detections averaged over the frame and its mirror image"),
    "39": Row(
        "33",
        dict(priors="pedestrian", input_size=(512, 640), ema_decay=0.999, schedule="cosine", test_flip=True),
        "rows 31, 32, 33, 36, 37 and 38 together (not 35, which excludes BatchNorm)",
    ),
    "40": Row(
        "33",
        {"priors": "pedestrian", "test_flip": True},
        "rows 31, 33 and 38 together, which helped on the demo set (see python -m tools.study beyond)",
    ),
    "41": Row(
        "",
        dict(network="mlpd", input_mode="halfway", input_size=(512, 640), batch_norm=True)
        | dict(priors="multispectral", lr=1e-4, schedule="step-mlpd", batch_size=12, epochs=40)
        | dict(masks_follow=True, augment=True, crop_aspect=(0.8, 1.2), min_input_height=12.0)
        | dict(mirror_apart=0.5, crop_apart=0.5, learn="all", min_score=0.1, nms_iou=0.425),
        "MLPD (Kim et al., 2021) with its recipe: two streams fused at all six maps, labels per modality, "
        "modalities cropped and mirrored separately; its authors' detections have 7.58 / 7.95 / 6.95",
    ),
    "42": Row(
        "41",
        dict(network="insanet", batch_size=8, shift_left=0.3),
        "INSANet (Lee et al., 2024): two streams up to conv3_3, attention within and between them, then one "
        "trunk; its authors' detections have 5.76 / 6.63 / 4.20",
    ),
    "43": Row("42", {"learn": "person"}, "only persons labelled person are positives"),
    "44": Row("42", {"priors": "pedestrian"}, "priors of a person's shape"),
    "45": Row("42", dict(ema_decay=0.999, schedule="cosine"), "averaged weights, cosine schedule"),
    "46": Row("42", {"test_flip": True}, "detections averaged over the frame and its mirror image"),
    "47": Row(
        "42",
        dict(infusion=(1, 1, 0, 0, 0, 0), seg_maps="sum", seg_balance="height", seg_weight=4.0),
        "segmentation infusion on the two finest maps, cells weighted as in SDS-RCNN",
    ),
    "48": Row("42", dict(batch_size=32, lr=4e-4, schedule="cosine"), "4x batch size and lr, cosine schedule"),
    "49": Row(
        "47",
        dict(learn="person", priors="pedestrian", ema_decay=0.999, schedule="cosine", test_flip=True),
        "rows 43 to 47 together; none was shown to help at small scale (see python -m tools.study past)",
    ),
    "50": Row(
        "47",
        {"infusion": (2, 1, 0, 0, 0, 0)},
        "row 47 with a mask head on each stream too, before fusion, trained on the boxes of its modality; "
        "worse at small scale",
    ),
    "demo": Row(
        "26b",
        dict(input_mode="early", width=0.25, priors="pedestrian", pretrained="none")
        | dict(infusion=(1, 1, 0, 0, 0, 0), loc_reduction="sum", lr=2e-3, weight_decay=1e-05)
        | dict(schedule="cosine", batch_size=4, epochs=14, zoom_out=1.0, copy_paste=0.5)
        | dict(eval_every=7, min_score=0.01, nms_iou=0.45, test_flip=True),
        "a narrow network with both modalities for the demo set",
    ),
    "streets": Row(
        "demo",
        dict(data_root="data/streets", input_size=(320, 384), batch_size=8, epochs=11, eval_every=11)
        | dict(ema_decay=0.999, zoom_out=1.5, crop_aspect=(0.75, 1.33), jitter=0.8, copy_paste=0.0)
        | dict(modality_dropout=0.3),
        "trained only on synthetic streets, to detect persons in real images (docs/streets.md); takes about "
        "an hour on two cores",
    ),
}
