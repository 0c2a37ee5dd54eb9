# A PostgreSQL server of the campaign: wanted up or down, killed, moved, and started again.
package SmChaos::Server;

use strict;
use warnings;

use File::Path ();
use IPC::Run ();
use SmChaos::Process qw(spawn is_alive end_process children wait_for run_quiet);
use Time::HiRes qw(sleep time);

# A server that cannot start is tried again after this time (s).
use constant RETRY => 0.3;

=head2 new(%options)

name; dir: a directory of its own; sockets: directory for its sockets; bin: of
PostgreSQL; port; conf: settings; shim: library to preload.

=cut

sub new
{
	my ($class, %options) = @_;
	my $self = bless { %options, wanted => 0, started => 0, generation => 0 }, $class;

	$self->{data} = "$self->{dir}/data";
	$self->{log} = "$self->{dir}/server.log";
	$self->{control} = "$self->{dir}/shim";
	mkdir($self->{dir}) or die "$self->{dir}: $!";
	$self->set_shim(0, 0);
	run_quiet("$self->{dir}/initdb.log", "$self->{bin}/initdb", '-D', $self->{data}, '-U', 'postgres', '-A', 'trust',
		'-E', 'UTF8', '--locale=C', '--wal-segsize=1', '-N');
	$self->append_conf("listen_addresses = ''\nunix_socket_directories = '$self->{sockets}'\ninclude_if_exists = '$self->{dir}/extra.conf'\n$self->{conf}");
	return $self;
}

sub append_conf
{
	my ($self, $text) = @_;
	open(my $fh, '>>', "$self->{data}/postgresql.conf") or die $!;
	print $fh $text;
	close($fh);
	return;
}

# Settings that come and go; take effect at the next start.
sub extra_conf
{
	my ($self, $text) = @_;
	open(my $fh, '>', "$self->{dir}/extra.conf") or die $!;
	print $fh $text;
	close($fh);
	return;
}

# What the preloaded library does: a full disk (1, that of tablespaces only: 2), a clock that is wrong by so many seconds.
sub set_shim
{
	my ($self, $disk_full, $clock) = @_;
	open(my $fh, '+>>', $self->{control}) or die $!;
	close($fh);
	open($fh, '+<', $self->{control}) or die $!;
	syswrite($fh, pack('qq', $disk_full, $clock * 1_000_000));
	close($fh);
	@$self{qw(disk_full clock)} = ($disk_full, $clock);
	return;
}

sub start
{
	my ($self) = @_;
	$self->{wanted} = 1;
	$self->tend;
	return;
}

# Starts it if it is wanted and not there.
sub tend
{
	my ($self) = @_;

	return if is_alive($self->{pid}) || !$self->{wanted} || time() < $self->{started} + RETRY;
	$self->{started} = time();
	$self->{pid} = spawn($self->{log}, $self->{dir},
		{ LD_PRELOAD => $self->{shim} // '', SM_CHAOS_SHIM => $self->{control} },
		"$self->{bin}/postgres", '-D', $self->{data}, '-p', $self->{port});
	return;
}

# It takes connections.
sub is_ready
{
	my ($self) = @_;

	return 0 unless is_alive($self->{pid});
	open(my $fh, '<', "$self->{data}/postmaster.pid") or return 0;
	my @lines = <$fh>;
	return @lines >= 8 && $lines[0] == $self->{pid} && $lines[7] =~ /^ready/ && !$self->{down};
}

sub await_ready
{
	my ($self, $patience) = @_;
	return wait_for($patience // 60, sub { $self->tend; $self->is_ready && $self->sql('SELECT 1') })
	  || die "$self->{name} does not start, see $self->{log}\n";
}

# Its processes whose title matches, the postmaster not among them.
sub processes
{
	my ($self, $pattern) = @_;
	return () unless is_alive($self->{pid});
	my %children = children($self->{pid});
	my @pids = sort { $a <=> $b } grep { !defined $pattern || $children{$_} =~ $pattern } keys %children;
	return @pids;
}

# One of them, chosen by a number from 0 to 1, gets a signal; false when there is none.
sub signal
{
	my ($self, $signal, $pattern, $which) = @_;
	my @pids = $self->processes($pattern) or return 0;
	return kill($signal, $pids[ int($which * @pids) ]);
}

# Ends the server and leaves it down until start().
sub stop
{
	my ($self, $signal, $patience) = @_;

	$self->{wanted} = 0;
	end_process($self->{pid}, $signal, $patience // 30);
	$self->{started} = 0;
	return;
}

# All of its processes stand still, or go on.
sub freeze
{
	my ($self) = @_;
	my %stopped;

	kill 'STOP', $self->{pid};
	while (my @new = grep { !$stopped{$_} && !$self->{spared}{$_} } $self->processes)
	{
		kill 'STOP', @new;
		$stopped{$_} = 1 foreach @new;
	}
	return keys %stopped;
}

# Takes the power away: everything stops at once, and of the WAL only what was flushed stays.
# The data directory goes to another place. Returns whether unflushed WAL could be taken away.
sub lose_power
{
	my ($self) = @_;
	my ($in, $out) = ("SELECT 'pid', pg_backend_pid();\n", '');
	my $asking = IPC::Run::start($self->psql_command, '<', \$in, '>', \$out, '2>', '/dev/null', IPC::Run::timer(30));
	my $pump = sub {
		my ($pattern, $seconds) = @_;
		my $until = time() + $seconds;
		while ($out !~ $pattern && time() < $until)
		{
			last unless eval { $asking->pump_nb; 1 };
			sleep 0.005;
		}
		return $out =~ $pattern ? [ $1, $2 ] : undef;
	};

	# One session asks what is flushed when all others stand still already.
	my $asker = $pump->(qr/^pid\|(\d+)()$/m, 5);
	$self->{spared} = $asker ? { $asker->[0] => 1 } : {};
	my @stopped = $self->freeze;
	my $flushed;
	if ($asker)
	{
		$in .= "SELECT 'wal', w.* FROM pg_walfile_name_offset(pg_current_wal_flush_lsn()) w;\n";
		$flushed = $pump->(qr/^wal\|(\w+)\|(\d+)$/m, 2);
	}
	kill 'KILL', $self->{pid}, @stopped, keys %{ $self->{spared} };
	$self->{spared} = {};
	eval { $asking->kill_kill };
	wait_for(10, sub { !is_alive($self->{pid}) });
	$self->{wanted} = 0;
	wait_for(10, sub { !grep { -e "/proc/$_" } @stopped });

	$self->forget_wal(@$flushed) if $flushed;
	$self->move_data;
	return defined $flushed;
}

sub forget_wal
{
	my ($self, $file, $offset) = @_;
	my $dir = "$self->{data}/pg_wal";

	opendir(my $handle, $dir) or die $!;
	foreach my $name (grep { /^[0-9A-F]{24}$/ && $_ ge $file } readdir($handle))
	{
		my $from = $name eq $file ? $offset : 0;
		my $size = -s "$dir/$name";

		open(my $fh, '+<', "$dir/$name") or die $!;
		sysseek($fh, $from, 0);
		syswrite($fh, "\0" x ($size - $from)) if $size > $from;
		close($fh);
	}
	return;
}

sub move_data
{
	my ($self) = @_;
	my $new = "$self->{dir}/data" . ++$self->{generation};

	rename($self->{data}, $new) or die "$new: $!";
	$self->{data} = $new;
	return;
}

# A copy of the data directory, made while nothing moves, is the server from now on; returns
# what is left of the old one: a function that goes on with it, and one that ends it.
sub copy_running
{
	my ($self) = @_;
	my ($old, $old_data) = @$self{qw(pid data)};
	my @stopped = $self->freeze;
	my $new = "$self->{dir}/data" . ++$self->{generation};

	run_quiet("$self->{dir}/copy.log", 'cp', '-a', $old_data, $new);
	unlink("$new/postmaster.pid");
	$self->{data} = $new;
	$self->{pid} = undef;
	$self->{port} ^= 1;
	$self->tend;
	return (
		sub { kill 'CONT', $old, @stopped; },
		sub {
			my @rest = keys %{ { children($old) } };

			kill 'KILL', $old, @rest;
			end_process($old, 'KILL');
			wait_for(10, sub { !grep { -e "/proc/$_" } @stopped, @rest });
			File::Path::remove_tree($old_data);
		});
}

sub psql_command
{
	my ($self, @arguments) = @_;
	return [ "$self->{bin}/psql", '-qAtX', '-v', 'ON_ERROR_STOP=1', '-h', $self->{sockets}, '-p', $self->{port},
		'-U', 'postgres', '-d', 'postgres', @arguments ];
}

# Runs SQL; in a list context (success, output, errors), else the output, or undef.
sub sql
{
	my ($self, $sql, $patience) = @_;
	my ($out, $err) = ('', '');
	my $ok = eval {
		IPC::Run::run($self->psql_command, '<', \$sql, '>', \$out, '2>', \$err, IPC::Run::timeout($patience // 10));
	};

	$err .= $@ if $@;
	chomp($out);
	return wantarray ? ($ok, $out, $err) : $ok ? $out : undef;
}

sub must
{
	my ($self, $sql, $patience) = @_;
	my ($ok, $out, $err) = $self->sql($sql, $patience);

	die "$self->{name}: $sql\n$err" unless $ok;
	return $out;
}

1;
