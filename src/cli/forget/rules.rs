//! The rules of retention, as commands take them.

use anyhow::Result;
use clap::Args;
use jiff::tz::TimeZone;

use crate::cli::exit::Failure;
use crate::repository::{Period, PeriodRule, Rules};

/// Which backups are kept.
#[derive(Debug, Args)]
pub struct RetentionArgs {
    /// Keeps the N most recent backups
    #[arg(long, value_name = "N")]
    keep_last: Option<u32>,
    /// Keeps the oldest backup of each of the N most recent days that have any
    #[arg(long, value_name = "N")]
    keep_daily: Option<u32>,
    /// The same of weeks, from Sunday to Saturday
    #[arg(long, value_name = "N")]
    keep_weekly: Option<u32>,
    /// The same of months
    #[arg(long, value_name = "N")]
    keep_monthly: Option<u32>,
    /// The same of years
    #[arg(long, value_name = "N")]
    keep_yearly: Option<u32>,
    /// Time zone of days, weeks, months and years, like Europe/Paris [default: that of this machine]
    #[arg(long, value_name = "TZ")]
    timezone: Option<String>,
    /// Keeps backups with this tag, or whose VM had it when they were made; may be repeated
    #[arg(long, value_name = "TAG")]
    keep_tag: Vec<String>,
}

impl RetentionArgs {
    /// Whether anything of it was given.
    pub fn is_given(&self) -> bool {
        self.keep_last.is_some()
            || self.periods().iter().any(Option::is_some)
            || self.timezone.is_some()
            || !self.keep_tag.is_empty()
    }

    /// Returns the tags that protect a backup.
    pub fn tags(&self) -> &[String] {
        &self.keep_tag
    }

    /// Returns the rules that were given, and the name of their time zone if one matters.
    ///
    /// # Errors
    /// `Usage` if no rule keeps anything, or the time zone is unknown.
    pub fn rules(&self) -> Result<(Rules, Option<String>)> {
        let size = |count: Option<u32>| usize::try_from(count.unwrap_or(0)).unwrap_or(usize::MAX);
        let counts = self.periods().map(size);
        let periods: Vec<PeriodRule> = Period::ALL
            .into_iter()
            .zip(counts)
            .map(|(period, count)| PeriodRule { period, count, begins: 0 })
            .collect();
        let zone = match &self.timezone {
            Some(name) => TimeZone::get(name).map_err(|_| {
                let message = "is unknown: one like Europe/Paris or UTC was expected, which the system's time zone \
                               database (package tzdata) holds";
                Failure::usage(format!("the time zone '{name}' {message}"))
            })?,
            None if counts == [0; 4] => TimeZone::UTC,
            None => TimeZone::try_system()
                .map_err(|_| Failure::usage("the time zone of this machine is not known: give --timezone"))?,
        };
        let name = zone.iana_name().map(str::to_owned).filter(|_| counts != [0; 4]);
        let rules = Rules::new(size(self.keep_last), periods, zone).ok_or_else(|| {
            Failure::usage(
                "no rule keeps anything, so nothing may be forgotten: give --keep-last, --keep-daily, --keep-weekly, \
                 --keep-monthly or --keep-yearly with a number above 0",
            )
        })?;
        Ok((rules, name))
    }

    /// In the order of [`Period::ALL`].
    fn periods(&self) -> [Option<u32>; 4] {
        [self.keep_daily, self.keep_weekly, self.keep_monthly, self.keep_yearly]
    }
}
