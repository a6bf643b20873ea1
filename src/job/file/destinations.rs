//! Where a job stores what it makes: repositories and SRs.

use super::{Known, unknown, values};
use crate::job::table::Section;
use crate::pool::SrAddress;

/// All of them.
pub(super) struct Destinations {
    /// Repositories, by name or path.
    pub repositories: Vec<String>,
    /// SRs that replicas are kept on.
    pub srs: Vec<SrAddress>,
    /// Whether it names repositories, be it wrongly.
    pub has_repositories: bool,
    /// The same of SRs.
    pub has_srs: bool,
}

/// Reads `[to]`.
pub(super) fn destinations(to: Section, known: &Known) -> Destinations {
    let repositories = to.texts("repositories");
    let is_path = |text: &str| text.starts_with('/') || text.starts_with("file:///");
    for repository in
        repositories.iter().filter(|text| !is_path(&text.value) && !known.repositories.contains(&text.value))
    {
        let message = unknown(&repository.value, "repository", &known.repositories);
        to.note_at(&repository.span, format!("{message}; a path begins with /"));
    }
    let mut srs: Vec<SrAddress> = Vec::new();
    let named = to.texts("srs");
    for text in &named {
        let sr: SrAddress = match text.value.parse() {
            Ok(sr) => sr,
            Err(error) => {
                to.note_at(&text.span, error);
                continue;
            }
        };
        if let Some(pool) = sr.pool.as_deref().filter(|pool| !known.pools.contains(*pool)) {
            to.note_at(&text.span, unknown(pool, "pool", &known.pools));
        }
        srs.push(sr);
    }
    if repositories.is_empty() && named.is_empty() {
        to.note_by(
            &["repositories", "srs"],
            "[to] names neither a repository nor an SR: give repositories = [\"NAME\"], srs = [\"SR\"], or both",
        );
    }
    let has_repositories = !repositories.is_empty() || to.is_wrong("repositories");
    let has_srs = !named.is_empty() || to.is_wrong("srs");
    to.finish();
    Destinations { repositories: values(repositories), srs, has_repositories, has_srs }
}
