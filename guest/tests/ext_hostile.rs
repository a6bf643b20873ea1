//! Whatever a guest writes into its metadata: reading ends, soon, with an answer or an error.

#[path = "compare/checksums.rs"]
mod checksums;
mod compare;

use std::fs;
use std::time::Duration;

use compare::churn::Churn;
use compare::generator::{self, Amount};
use compare::image::{Mount, Reflinks, make};
use compare::{Random, hostile};
use guest::ext::Ext;

/// Bytes of an image.
const SIZE: u64 = 24 << 20;

#[test]
fn reading_ends_whatever_is_in_the_metadata() {
    let seed = Random::seed();
    let mut random = Random::new(seed);
    let place = Reflinks::new(1 << 30);
    let image = place.at("image");
    let sets: [(&[&str], &str); 6] = [
        (&["mkfs.ext4", "-O", "^metadata_csum,inline_data,ea_inode"], "noatime"),
        (&["mkfs.ext4", "-b", "4096"], "noatime"),
        (&["mkfs.ext4", "-O", "^metadata_csum", "-b", "1024"], "noatime,data=journal"),
        (&["mkfs.ext3", "-b", "1024"], "noatime"),
        (&["mkfs.ext4", "-O", "^metadata_csum,fast_commit", "-b", "1024"], "noatime,commit=300"),
        (&["mkfs.ext2"], "noatime"),
    ];
    for (mkfs, options) in sets {
        make(&image, SIZE, mkfs);
        let bytes = {
            let mount = Mount::new(&image, "ext4", options);
            generator::fill(mount.path(), Amount { names: 400, holes: 200 });
            let mut churn = Churn::new(mount.path(), seed);
            churn.work(50);
            // Its journal is full, if it has one.
            churn.sync();
            churn.work_fast(20);
            if mkfs[0] == "mkfs.ext2" {
                churn.sync();
            }
            fs::read(place.copy(&image, "snapshot")).expect("it was just made")
        };
        let time = Duration::from_millis(1500 * compare::rounds(1));
        // Of those that have checksums it is seen that they are refused.
        let open: hostile::Open = |disk| Ok(Box::new(Ext::open(disk)?));
        hostile::change(&format!("{mkfs:?}"), bytes, open, checksums::fast_commits, &mut random, time);
    }
}
