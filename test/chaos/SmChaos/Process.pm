# Processes that the campaign started, known by their id, and what /proc says of them.
package SmChaos::Process;

use strict;
use warnings;

use Exporter 'import';
use POSIX qw(WNOHANG _exit);
use Time::HiRes qw(sleep time);

our @EXPORT_OK = qw(spawn is_alive end_process children wait_for run_quiet);

my %running;    # pid => owner

# Starts a program; its output goes to a file. Returns the process id.
sub spawn
{
	my ($log, $dir, $env, @command) = @_;
	my $pid = fork() // die "could not fork: $!";

	if ($pid == 0)
	{
		$SIG{$_} = 'DEFAULT' foreach qw(INT TERM PIPE);
		chdir($dir) or _exit(127);
		open(STDIN,  '<',  '/dev/null') or _exit(127);
		open(STDOUT, '>>', $log)        or _exit(127);
		open(STDERR, '>&', \*STDOUT)    or _exit(127);
		@ENV{ keys %$env } = values %$env;
		exec(@command) or _exit(127);
	}
	$running{$pid} = $$;
	return $pid;
}

# Whether one of ours still runs; takes note of its end.
sub is_alive
{
	my ($pid) = @_;

	return 0 unless $pid && $running{$pid};
	return 1 if waitpid($pid, WNOHANG) == 0;
	delete $running{$pid};
	return 0;
}

# Sends a signal and waits; what does not obey is killed.
sub end_process
{
	my ($pid, $signal, $patience) = @_;

	return unless is_alive($pid);
	kill $signal, $pid;
	my $until = time() + ($patience // 5);
	while (is_alive($pid))
	{
		kill 'KILL', $pid if time() > $until;
		sleep 0.01;
	}
	return;
}

# The children of a process: pid => what it calls itself.
sub children
{
	my ($parent) = @_;
	my %children;

	opendir(my $proc, '/proc') or return ();
	foreach my $pid (grep { /^\d+$/ } readdir($proc))
	{
		open(my $fh, '<', "/proc/$pid/stat") or next;
		my $stat = <$fh> // next;
		close($fh);
		# the name may hold anything, the last parenthesis ends it
		next unless $stat =~ /^.*\) (\S) (\d+) /s && $2 == $parent && $1 ne 'Z';
		open($fh, '<', "/proc/$pid/cmdline") or next;
		my $title = <$fh> // '';
		$title =~ tr/\0/ /;
		$children{$pid} = $title;
	}
	return %children;
}

sub wait_for
{
	my ($seconds, $condition) = @_;
	my $until = time() + $seconds;

	until ($condition->())
	{
		return 0 if time() > $until;
		sleep 0.02;
	}
	return 1;
}

# A command that has to succeed.
sub run_quiet
{
	my ($log, @command) = @_;
	my $pid = spawn($log, '/', {}, @command);

	waitpid($pid, 0);
	delete $running{$pid};
	die "@command failed, see $log\n" if $?;
	return;
}

# Nothing is left behind, whatever ended the campaign.
END
{
	local $?;
	local @SIG{qw(INT TERM)} = ('IGNORE') x 2;
	foreach my $pid (grep { $running{$_} == $$ } keys %running)
	{
		my @below = keys %{ { children($pid) } };
		kill 'KILL', $pid, @below;
	}
}

1;
