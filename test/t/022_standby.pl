# A standby has no worker; once promoted it has one.

use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $primary = PostgreSQL::Test::Cluster->new('primary');
$primary->init(allows_streaming => 1);
$primary->append_conf('postgresql.conf', "shared_preload_libraries = 'softmobile'");
$primary->start;
$primary->safe_psql('postgres', 'CREATE EXTENSION softmobile');
$primary->backup('base');

my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'base', has_streaming => 1);
$standby->start;
$primary->wait_for_catchup($standby);

my $processes = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'softmobile%'";
is($standby->safe_psql('postgres', $processes), '0', 'a standby has no launcher and no worker');
is( $standby->safe_psql('postgres', 'SELECT running, detail FROM softmobile.worker_status()'),
	'f|This server is a standby.',
	'... and worker_status() says so');
my ($ret, $stdout, $stderr) =
  $standby->psql('postgres', '\set VERBOSITY verbose
SELECT * FROM softmobile.sync_run()');
like($stderr, qr/ERROR:  25006: .*HINT:  Call sync_run\(\) on the primary/s,
	'... as does sync_run()');

$primary->stop;
$standby->promote;
ok($standby->poll_query_until('postgres', 'SELECT running FROM softmobile.worker_status()'),
	'a promoted standby has a worker');
$standby->stop;

done_testing();
