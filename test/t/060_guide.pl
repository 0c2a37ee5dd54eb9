# The operations guide, in both languages, is true: every SQL block of it runs, in order,
# against live servers of a shop and of headquarters, the cut and the reconnection
# included, and what the guide says is seen is seen.
#
# A comment before a block says what the reader cannot: <!-- central --> where it runs,
# sees: what its output matches, until: what its output matches sooner or later,
# fails: its error, cut and reconnect: what is done to the link.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::Bin/../perl";

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmGateway;
use Test::More;
use Time::HiRes qw(usleep);

my @tables = (
	'CREATE TABLE sucursales (id text PRIMARY KEY, nombre text)',
	'CREATE TABLE ventas (id integer PRIMARY KEY, sucursal_id text, folio text, total numeric(12, 2), fecha timestamptz NOT NULL DEFAULT now())',
	'CREATE TABLE detalle_ventas (id integer PRIMARY KEY, venta_id integer, sku text, cantidad integer)',
	'CREATE TABLE devices (id integer PRIMARY KEY, store_id text, sku text, quantity integer)',
	'CREATE TABLE inventory_movements (id integer PRIMARY KEY, store_id text, sku text, quantity integer, created_at timestamptz NOT NULL DEFAULT now())',
	'CREATE TABLE notas (id integer PRIMARY KEY, sucursal_id text, folio text, total numeric(12, 2))',
	"INSERT INTO devices VALUES (1, 'norte', 'A100', 10)");

# The guide's parts in order: [action, argument] and [sql, text, directives].
sub parts_of
{
	my ($file) = @_;
	my @parts;
	my %directives;

	foreach my $part (split /^(<!-- .*? -->\n|```sql\n.*?^```\n)/ms, slurp_file($file))
	{
		if ($part =~ /^<!-- (.*) -->$/)
		{
			my $comment = $1;

			if ($comment =~ /^(cut|reconnect)$/) { push @parts, [$1]; }
			else
			{
				foreach my $word (split /; /, $comment)
				{
					die "unknown directive \"$word\" in $file" unless $word =~ /^(central|token|sees|until|fails)(?:: (.*))?$/;
					$directives{$1} = $2 // 1;
				}
			}
		}
		elsif ($part =~ /^```sql\n(.*)^```$/ms)
		{
			push @parts, [ 'sql', $1, {%directives} ];
			%directives = ();
		}
	}
	return @parts;
}

# Runs the guide from beginning to end.
sub follow
{
	my ($language, $file) = @_;
	my $central = PostgreSQL::Test::Cluster->new("central_$language");
	my $shop = PostgreSQL::Test::Cluster->new("shop_$language");
	my $token_file = "$PostgreSQL::Test::Utils::tmp_check/token_$language";
	my ($gateway, $port, $n);

	$central->init;
	$central->start;
	$central->safe_psql('postgres', "CREATE EXTENSION softmobile; CREATE ROLE gateway LOGIN; SELECT softmobile.grant_central('gateway')");
	use_central($central);
	$gateway = start_gateway();
	$port = $gateway->{port};
	$shop->init;
	$shop->append_conf('postgresql.conf', "shared_preload_libraries = 'softmobile'\nsoftmobile.probe_interval = 1s\nfsync = on\nTimeZone = 'UTC'");
	$shop->start;
	$shop->safe_psql('postgres', 'CREATE DATABASE tienda');
	$shop->safe_psql('tienda', join(';', @tables));

	foreach my $part (parts_of($file))
	{
		my ($what, $sql, $directives) = @$part;

		if ($what eq 'cut') { stop_gateway($gateway); next; }
		if ($what eq 'reconnect') { $gateway = start_gateway('--listen', "127.0.0.1:$port"); next; }

		my $where = $directives->{central} ? $central : $shop;
		my $database = $directives->{central} ? 'postgres' : 'tienda';
		my $name = sprintf '%s %d: %s', $language, ++$n, substr($sql =~ s/\s+/ /gr, 0, 90);
		my $deadline = time + $PostgreSQL::Test::Utils::timeout_default;
		my ($out, $err);

		$sql =~ s{https://central\.example/softmobile}{http://127.0.0.1:$port}g;
		$sql =~ s{/etc/softmobile/token}{$token_file}g;
		for (;;)
		{
			($out, $err) = ('', '');
			$where->psql($database, $sql, stdout => \$out, stderr => \$err, on_error_stop => 1, extra_params => [qw(-P format=aligned -P tuples_only=off)]);
			last unless $directives->{until} && $out !~ /$directives->{until}/ && time < $deadline;
			usleep(100_000);
		}
		if ($directives->{fails}) { like($err, qr/ERROR:  .*$directives->{fails}/, $name); next; }
		is($err =~ s/^(psql:<stdin>:\d+: )?(NOTICE|WARNING|DETAIL|HINT):.*\n?//mgr, '', "$name: no error") or next;
		like($out, qr/$_/, $name) foreach grep { defined } @$directives{qw(sees until)};
		if ($directives->{token})
		{
			append_to_file($token_file, $out =~ /([0-9a-f]{64})/ ? "$1\n" : die "no token in: $out");
			chmod 0600, $token_file or die "chmod: $!";
		}
	}
	stop_gateway($gateway);
	$shop->stop;
	$central->stop;
	return;
}

my %guide = (es => 'operacion-offline.md', en => 'offline-operation.md');
my %blocks;

foreach my $language (qw(es en))
{
	my $file = "$FindBin::RealBin/../../doc/$guide{$language}";

	$blocks{$language} = grep { $_->[0] eq 'sql' } parts_of($file);
	follow($language, $file);
}
is($blocks{en}, $blocks{es}, 'both languages have the same steps');
cmp_ok($blocks{es}, '>', 30, 'the blocks were found');
done_testing();
