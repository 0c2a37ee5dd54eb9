# What goes on while faults strike: terminals, bulk loads, and somebody who ends what was left prepared.
package SmChaos::Load;

use strict;
use warnings;

use SmChaos::Process qw(spawn is_alive end_process wait_for);
use Time::HiRes qw(sleep time);

# [name, clients, transactions a second, settings, scripts with weights]
my @terminals = (
	[ 'tills',    3, 20, '',                         'sale@5', 'entity@6', 'savepoint@2', 'undo@2', 'new_branch@1', 'catalogue@2' ],
	[ 'lazy',     2, 15, '-c synchronous_commit=off', 'sale@5', 'entity@6', 'savepoint@2', 'undo@1' ],
	[ 'long',     3, 3,  '',                         'long' ],
	[ 'twophase', 1, 4,  '',                         'prepared' ]);

sub new
{
	my ($class, %options) = @_;
	return bless { %options, running => {}, starts => 0, paused => 0, bulk => 0, janitor_at => 0, bulk_at => 0 }, $class;
}

# Starts what has ended.
sub tend
{
	my ($self) = @_;
	my $server = $self->{server};

	return if $self->{paused} || !$server->is_ready;
	foreach my $terminal (@terminals)
	{
		my ($name, $clients, $rate, $settings, @scripts) = @$terminal;
		my $state = $self->{running}{$name} //= { at => 0 };

		next if is_alive($state->{pid}) || time() < $state->{at};
		$state->{at} = time() + 0.2;
		$self->{starts}++;
		$state->{pid} = spawn("$self->{dir}/$name.log", $self->{dir},
			{ PGOPTIONS => "-c softmobile.reason='Venta_normal' -c lock_timeout=3s -c statement_timeout=20s $settings", PGAPPNAME => $name },
			"$server->{bin}/pgbench", '-n', '-h', $server->{sockets}, '-p', $server->{port}, '-U', 'seller',
			'-c', $clients, '-R', $rate, '-T', 30, '--max-tries=5', "--random-seed=$self->{starts}",
			(map { ('-f', "$self->{scripts}/" . s/(@|$)/.pgbench$1/r) } @scripts), 'postgres');
	}
	$self->tend_janitor;
	$self->tend_bulk;
	return;
}

# SQL in a session of its own; one of each name at a time.
sub in_background
{
	my ($self, $name, $sql, $user, $server) = @_;
	my $file = "$self->{dir}/$name.sql";

	$server //= $self->{server};
	end_process($self->{running}{$name}{pid}, 'KILL');

	open(my $fh, '>', $file) or die $!;
	print $fh $sql;
	close($fh);
	$self->{running}{$name}{pid} = spawn("$self->{dir}/$name.log", $self->{dir},
		{ PGOPTIONS => "-c softmobile.reason='Carga_de_datos' -c lock_timeout=3s -c statement_timeout=20s" },
		@{ $server->psql_command('-U', $user // 'seller', '-v', 'ON_ERROR_STOP=0', '-f', $file) });
	return;
}

# Transactions that were left prepared are ended, some at once, some after a while.
sub tend_janitor
{
	my ($self) = @_;

	return if time() < $self->{janitor_at} || is_alive($self->{running}{janitor}{pid});
	$self->{janitor_at} = time() + 1;
	$self->in_background('janitor', prepared_ended("random() < 0.1"));
	return;
}

sub prepared_ended
{
	my ($which) = @_;
	return "SELECT format('%s PREPARED %L', CASE WHEN random() < 0.6 THEN 'COMMIT' ELSE 'ROLLBACK' END, gid) FROM pg_prepared_xacts WHERE $which \\gexec\n";
}

# Hundreds of rows at once; one load in four is taken back.
sub tend_bulk
{
	my ($self) = @_;

	return if time() < $self->{bulk_at} || is_alive($self->{running}{bulk}{pid});
	$self->{bulk_at} = time() + 3;
	my $n = ++$self->{bulk};
	my $rows = 50 + $n * 97 % 500;
	my $end = $n % 4 ? 'COMMIT' : 'ROLLBACK';

	$self->in_background('bulk', join("\n",
		'BEGIN;', 'COPY movement (id, branch, qty, note) FROM STDIN;',
		(map { join("\t", "B$self->{seed}-$n-$_", 'b' . ($_ % 3 + 1), $_, 'carga') } 1 .. $rows), '\\.', "$end;", ''));
	return;
}

# Nobody sells any more; transactions that were under way are over.
sub pause
{
	my ($self) = @_;

	$self->{paused} = 1;
	foreach my $state (values %{ $self->{running} }) { end_process($state->{pid}, 'KILL'); }
	# A session that sleeps does not see that its client is gone; where the clock was set back, for hours.
	foreach my $patience (6, 20)
	{
		my @left;
		return 1 if wait_for($patience, sub { !(@left = $self->{server}->processes(qr/^postgres: (seller|postgres) /)) });
		kill 'TERM', @left;
	}
	return 0;
}

sub resume { $_[0]{paused} = 0; return; }

1;
